from kvpo.config import *  # noqa: F403  (moved to kvpo.config: import from there)
