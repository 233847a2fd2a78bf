"""Where workers run: Ray places and ends them, the driver watches. No tensor passes through here.

cli/            the commands
launch          a run: one group of workers after the other; its one result or error
placing         room for as many workers as there is room for, and the workers in it
growth          room for more of them, asked for while they train
group           the group that they are: watched for losses and hangs, ended together
worker          the Ray actor in which the trainer runs
worker_output   its log and what is printed there, in lines for the driver
budget          how often a run may fail without getting any further
stopping        signals, and the time within which a stop is granted
nodes           nodes that a run should not use
environment     what workers on other nodes know of the driver's
interfaces      network interfaces by address
ray_session     Ray for one command, joined or started; whether it lives
head            whether the head of a cluster can be joined, and why not
local_ray       a Ray of this machine alone
reaper          ends what a killed driver leaves behind
job_server      a cluster's job server, and the jobs of runs that it tells of
jobs            a run as a job: its command, its environment, its id
watch           a run brought to its end, job after job
doctor          what a run needs of a machine, looked at before there is one
doctor_nodes    the same of every node of a cluster, and between them
comparison      a table of runs that are compared
compare         its runs trained and measured, some at a time
bounded         calls that may never return
errors          which errors end a command with one line, and with which status
"""
