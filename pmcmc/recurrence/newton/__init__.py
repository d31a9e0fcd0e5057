"""Newton-type solvers: DEER, quasi-DEER, ELK, quasi-ELK, Picard and Jacobi iteration.

All solve ``x[t] = f(x[t-1], u[t])``, t = 1..T, by iterating on all states at once. An iteration evaluates the residual
``r[t] = f(x[t-1], u[t]) - x[t]`` at every t and solves one linear recursion ``e[t] = A[t] e[t-1] + r[t]``, where A[t]
approximates the Jacobian of f.

- `newton`: `Newton`, and the iteration that all solvers share; `trust_region`: `LevenbergMarquardt`; `windowed` slides
  a window along the path.
- `equations`: evaluating the equations and judging the result.
- `jacobian`, `hutchinson`: approximations A[t], exact or stochastic, and the coordinates they are made in.
- `kalman`: the trust-region step by associative scans.
- `implicit_diff`: derivatives of the solution.
"""
