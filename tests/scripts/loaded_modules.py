"""Runs the code that is its first argument; which of the modules named after it are then loaded."""

import json
import sys

exec(sys.argv[1])
print(json.dumps([name for name in sys.argv[2:] if name in sys.modules]))
