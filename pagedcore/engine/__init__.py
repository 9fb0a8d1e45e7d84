"""The step loop, and how other processes and Python programs reach it.

engine.py   Engine: add, abort, step; joins a scheduler and an executor
build.py    an Engine from a configuration: plugins, model folder, executor, scheduler
llm.py      LLM: the offline Python API, an Engine in this process
wire.py     the messages between server and client
server.py   EngineServer: an Engine behind a unix socket
client.py   EngineClient: its other end, for one asyncio loop
process.py  an EngineServer in a child process
"""
