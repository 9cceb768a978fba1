"""`python -m moecc.cli` is the command `moecc`."""

import sys

from moecc.cli import main

sys.exit(main())
