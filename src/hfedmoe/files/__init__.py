"""Files on disk: safetensors without copies, atomic writes, locks, the cache folder and the hub."""
