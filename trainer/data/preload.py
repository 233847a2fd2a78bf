"""What loader workers share: imported once by the server that they are forked from.

Nothing here starts a thread or opens a connection, which would not survive the fork.
"""

import gc

import s3fs  # noqa: F401

import trainer.data.loader  # noqa: F401

# Collections would write to the pages of all that is imported, and so unshare them.
gc.collect()
gc.freeze()
