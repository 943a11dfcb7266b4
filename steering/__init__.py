"""What the scripts stand on: data layouts, chat format, loading, the fast path, files of runs."""
