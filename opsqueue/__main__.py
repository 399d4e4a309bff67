"""`python -m opsqueue` is the command `opsqueue`."""

import sys

from opsqueue.cli.main import main

sys.exit(main())
