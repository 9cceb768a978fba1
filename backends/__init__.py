"""Imported as `moecc.backends`; see README.md."""

if __name__ != "moecc.backends":
    raise ImportError(
        f"import moecc.backends, not {__name__}: one file must not become two modules"
    )
