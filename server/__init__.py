"""The server side of a federation on Flower: cohort, round loop, in-process engine."""

from server.environment import stay_offline

stay_offline()
