"""Several processes, one trajectory. Everything that talks to another process is in this folder."""
