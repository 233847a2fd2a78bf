"""Reading from object storage, from an empty cache: called by loader.py --cold."""
from pathlib import Path
GATEWAY = Path("../shared/tools/rgw-up")
def report(*a: object) -> str:
    return ""
