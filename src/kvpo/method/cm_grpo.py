"""CM-GRPO (RAVEN, arXiv 2605.15190): a re-noising sampler already is a stochastic policy.

    x' = alpha x0_theta(x) + sigma' eps,   alpha = 1 - sigma',   x0_theta = x - sigma v

is a Gaussian with mean alpha x0_theta and deviation sigma'. Branches differ in the re-noise eps; neither an
SDE nor a second context is needed. The last step, which lands on the clean latents, has no policy.
"""

from kvpo.method.evidence import Method
from kvpo.method.flow import renoise_coefficients
from kvpo.method.gaussian import gaussian_method
from kvpo.method.settings import CmGrpoSettings

METHOD: Method[CmGrpoSettings] = gaussian_method(renoise_coefficients)
