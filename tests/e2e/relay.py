"""Passes connections on to the same port of 127.0.0.1, as the reverse proxy does.

``python -m tests.e2e.relay <address> <port>``
"""

from __future__ import annotations

import asyncio
import contextlib
import sys


async def copied(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await source.read(65_536):
            target.write(data)
            await target.drain()
    target.close()


async def served(address: str, port: int) -> None:
    async def passed(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            other_reader, other_writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            writer.close()
            return
        await asyncio.gather(copied(reader, other_writer), copied(other_reader, writer))

    server = await asyncio.start_server(passed, address, port)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(served(sys.argv[1], int(sys.argv[2])))
