"""The rivals of attnc, one file each, with a common interface.

Each file has `NAME`, `available()`, which returns the rival's version or None if it cannot be imported, and functions
that make its calls. A call takes and returns (batch, heads, tokens, width), whatever layout the rival uses; a change
of layout is a view. If a rival cannot express a mask, or has no kernel on a device, the function returns an `Absent`
with the reason, which goes into the row. `published.py` holds published figures, for rivals that are not installed
here.
"""
