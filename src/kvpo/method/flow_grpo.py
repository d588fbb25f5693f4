"""Flow-GRPO: stochastic solver steps in place of the ODE's, each one a Gaussian policy.

    x' = a x + c v + s eps   with   a = 1 + r^2 / (2 t) dt,  c = (1 + r^2 (1 - t) / (2 t)) dt,  s^2 = -r^2 dt
    r = kappa sqrt(t / (1 - t)),  dt = t' - t < 0;  at t = 1, r is that of the next level

Every coefficient keeps the marginal distribution of the flow; kappa = 0 is the Euler step. Branches differ in
eps. As published, except that no noise is added after the solver steps that are trained on, and never in the
last one: with few steps, noise that no later step can remove would show in the video.
"""

from kvpo.method.evidence import Method
from kvpo.method.flow import sde_coefficients
from kvpo.method.gaussian import gaussian_method
from kvpo.method.settings import FlowGrpoSettings

METHOD: Method[FlowGrpoSettings] = gaussian_method(sde_coefficients)
