"""``python -m d2o_client._cli``: the command line where its script is not on the PATH."""

import sys

from d2o_client._cli import main

sys.exit(main())
