"""What `hfedmoe join` says: on the screen and in its log."""

import time
from io import FileIO


class Voice:
    """Shows lines, and writes them to the log with their time. Used from two threads."""

    def __init__(self, log: FileIO) -> None:
        self._log = log  # without a buffer, which would keep what cannot be written
        self._fails = False

    def say(self, text: str) -> None:
        """Say one line."""
        print(text, flush=True)
        try:
            self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n".encode())
            self._fails = False
        except OSError as error:  # a device with a full disk still has an owner who reads the screen
            if not self._fails:
                print(f"warning: {self._log.name}: cannot be written ({error.strerror})", flush=True)
            self._fails = True
