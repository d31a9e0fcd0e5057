"""Pictures of what a run measured. Matplotlib is imported when a function here runs, not before.

As in ArviZ each draws into the axes given by ``ax``, or into new ones, and returns them.
"""

from pmcmc.plots._iterates import newton_iterates
from pmcmc.plots._merges import merge_distances
from pmcmc.plots._shooting import merge_fronts
from pmcmc.plots._time import planned_time, speed_up

__all__ = ["merge_distances", "merge_fronts", "newton_iterates", "planned_time", "speed_up"]
