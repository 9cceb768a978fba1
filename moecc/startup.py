"""What Python runs when it starts, where moecc is installed: no `import moecc` is needed.

pip puts this file into site-packages as `_moecc_startup`, and beside it `startup.pth`, whose line
imports it unless MOECC_STARTUP is 0. It waits for transformers' quantizers, which every
`from_pretrained` imports, and leaves the rest to `moecc.hook`. Nothing else is imported here: every
process of that Python runs it.
"""

import sys


class _Waiting:
    """A finder that finds nothing itself and steps aside at the first import that concerns it."""

    def find_spec(self, fullname, path=None, target=None):  # type: ignore[no-untyped-def]
        if fullname != "transformers.quantizers.auto" or self not in sys.meta_path:
            return None
        try:
            sys.meta_path.remove(self)
            from importlib.util import find_spec

            from moecc.hook import register_when_needed

            register_when_needed()
            return find_spec(fullname)
        except Exception as error:  # transformers must go on where moecc is broken
            _say(f"moecc: artifacts can't be opened: {error}\n")
            return None


def _say(line: str) -> None:
    try:
        sys.stderr.write(line)
    except Exception:  # it is closed, or None
        pass


sys.meta_path.insert(0, _Waiting())
