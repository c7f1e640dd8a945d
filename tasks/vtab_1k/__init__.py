"""Cards of the nineteen tasks of VTAB-1k (see `README.md`)."""
