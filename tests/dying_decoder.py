"""A process for decoding that takes a file and dies of it, whatever the file is."""

import sys

COMMAND = (
    sys.executable,
    "-c",
    "import socket, sys; link = socket.socket(fileno=int(sys.argv[1])); link.send(b'ready'); link.recv(4096)",
)
