"""The command channel: authenticated request and reply between processes of one host."""
