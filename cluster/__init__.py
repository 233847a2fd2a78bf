"""Where workers run: Ray places, watches and restarts them. No tensor passes through here.

cli/            the commands
launch          a run on Ray: workers placed, lost ones replaced, signals, one error at the end
driver_channel  log lines and results from the workers to the driver, the wish to stop to them
local_ray       a Ray of this machine alone, for one command
reaper          ends what a killed driver leaves behind
errors          which errors end a command with one line, and which no new attempt can mend
"""
