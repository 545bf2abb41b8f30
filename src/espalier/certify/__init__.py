"""What can be proved about a trained network: Lipschitz bounds, certified radii, and attacks that try to break them."""

from espalier.certify.attack import autoattack_l2, pgd_l2
from espalier.certify.attack_report import AttackReport, CertificateBrokenError, challenge
from espalier.certify.bound import lipschitz_bound
from espalier.certify.certificate import Certificate
from espalier.certify.layers import register_lipschitz
from espalier.certify.radius import certify
from espalier.certify.refusal import UncertifiableError

__all__ = [
    "AttackReport",
    "Certificate",
    "CertificateBrokenError",
    "UncertifiableError",
    "autoattack_l2",
    "certify",
    "challenge",
    "lipschitz_bound",
    "pgd_l2",
    "register_lipschitz",
]
