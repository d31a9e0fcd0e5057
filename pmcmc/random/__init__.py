"""All random numbers: counter-based bits, distributions computed from them, and the noise of each step.

For a given kernel and target, the noise of step t of chain c is a function of (noise key, c, t) alone; the noise key is
the second half of a split of the run's key (`pmcmc.sampling.session`). It is drawn in one place,
`pmcmc.random.streams.step_noise`: the key of chain c is ``fold_in(noise key, c)``, the key of step t is
``fold_in(chain key, t)``, and `Kernel.sample_noise` turns the step's key into the noise of one step, with the
distributions of this package. A step is deterministic given its noise; where the noise is itself a key (NUTS,
BlackJAX algorithms, some custom updates), the step derives further numbers from that key alone. The noise therefore
does not depend on the number of chains, the solver, its blocks, the devices, or how often a run was interrupted, and
any step can be drawn again later, as `Chain.verify` does. Starting positions and warm-up use other keys
than the noise key, and the probes of stochastic Jacobians (`HutchinsonDiagonal`) affect convergence only.

- `pmcmc.random.streams`: JAX's hash, keys of chains and noise of steps.
- `pmcmc.random.distributions`: uniforms, normals, gamma variates and discrete draws.
"""
