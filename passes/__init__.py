"""Imported as `moecc.passes`; see README.md."""

if __name__ != "moecc.passes":
    raise ImportError(f"import moecc.passes, not {__name__}: one file must not become two modules")
