"""The step loop, and how other processes and Python programs reach it.

engine.py      Engine: add, abort, step; joins a scheduler and an executor
build.py       an Engine from a configuration: plugins, model folder, executor, scheduler
llm.py         LLM: the offline Python API, an Engine in this process
outputs.py     what LLM gives back, and how tokens become it
embeddings.py  the same for vectors
info.py        EngineInfo: what an engine tells about itself
wire.py        the messages between front ends and an engine
server.py      EngineServer: an Engine behind a unix socket
connections.py the server's side of the socket, in a thread of its own
client.py      EngineClient: the front end's side, for one asyncio loop
generation.py  Generation: one request, as its front end sees it
link.py        the client's connection: kept up, and known to be down
process.py     an EngineServer in a child process
"""
