"""From the lines of a recurrence to forms that are computed chunk by chunk."""
