"""`python -m moecc` is the command `moecc`."""

from moecc_start import main

raise SystemExit(main())
