"""The version, once: the package's metadata and `opsqueue --version` read it here."""

VERSION = "0.1.0"
