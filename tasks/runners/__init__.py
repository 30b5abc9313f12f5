"""Where jobs run: in children of this process, on a Dask cluster, on workers of a Prefect pool. Imports no torch."""
