"""`python -m moecc` is the command `moecc`."""

from moecc.cli import main

raise SystemExit(main())
