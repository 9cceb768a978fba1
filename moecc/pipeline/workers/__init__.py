"""Where units of work run: in this process, in others, on a Ray cluster; always the same bytes."""
