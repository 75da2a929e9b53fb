"""The revisions, oldest first by name. A published revision is never edited: a change is a new file."""
