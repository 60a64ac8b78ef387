"""Ground floor: errors, text, untrusted JSON, memory, threads."""
