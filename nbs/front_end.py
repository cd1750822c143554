"""Many clients of one engine in one event loop: the heart of a server, without HTTP (day 5)."""

import asyncio
import queue
import threading

from nanovllm import LLM


class AsyncLLM:
    """An engine in a thread of its own.

    Requests go in by one queue, `inbox`; outputs come out by one queue for each client.
    """

    def __init__(self, **settings):
        self.inbox, self.loop = queue.Queue(), asyncio.get_running_loop()
        threading.Thread(target=self._run, args=(settings,), daemon=True).start()

    def _run(self, settings):
        """The thread: takes what lies in the inbox, then a step, and so on."""
        engine, clients = LLM(**settings), {}
        while True:
            while not self.inbox.empty() or engine.is_finished():    # sleeps only when idle
                what, *given = self.inbox.get()
                if what == "close":
                    return engine.close()
                if what == "abort":
                    engine.abort(given[0])
                    clients.pop(given[0], None)
                else:
                    self._add(engine, clients, *given)
            for out in engine.step():
                self._tell(clients[out.request_id], out)
                if out.output:
                    del clients[out.request_id]

    def _add(self, engine, clients, prompt, params, client):
        """Queue a request; the client hears its id, or what is wrong with it."""
        try:
            request_id = engine.add_request(prompt, params)
        except (TypeError, ValueError) as error:
            self._tell(client, error)                                # it alone
        else:
            clients[request_id] = client
            self._tell(client, request_id)

    def _tell(self, client, message):
        """Put something into a queue of the event loop, from this thread."""
        self.loop.call_soon_threadsafe(client.put_nowait, message)

    async def stream(self, prompt, params):
        """The text of a request, piece by piece; leaving early aborts it."""
        mine, out = asyncio.Queue(), None
        self.inbox.put(("add", prompt, params, mine))
        request_id = await mine.get()
        if isinstance(request_id, Exception):
            raise request_id
        try:
            while out is None or out.output is None:
                out = await mine.get()
                yield out.text
        finally:                       # also where the client is cancelled
            if out is None or out.output is None:
                self.inbox.put(("abort", request_id))

    def close(self):
        """End the thread; the engine gives its memory back."""
        self.inbox.put(("close",))
