"""What everything else stands on: errors, text, safe parsing, memory."""
