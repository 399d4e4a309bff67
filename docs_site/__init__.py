"""The documentation as a web site; `make docs` builds it. No part of the package."""
