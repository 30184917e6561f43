"""The rivals of attnc, one file each, with the same small interface.

`NAME`; `available()`, its version, None where it cannot be imported; and functions that make its calls. A call takes
q, k and v (batch, heads, tokens, width) and gives (batch, heads, tokens, width), whatever layout the rival has of its
own: a change of layout is a view. Where a rival has no words for a mask, or no kernel on a device, the function gives
an `Absent` with the reason, which goes into the row. `published.py` has what others published, for rivals that are not
there.
"""
