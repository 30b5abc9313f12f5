"""From a recipe to a run: the command line, the plan, the run and its pages. Rooms, outermost first: cli, run, report, planning."""
