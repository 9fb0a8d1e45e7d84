"""`python -m pagedcore.cli`, where the script is not on the path."""

import sys

from pagedcore.cli import main

sys.exit(main())
