"""One file per dataset: its own folders and lists -> a plan of clips."""
