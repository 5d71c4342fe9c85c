"""A grid of defenses, strengths and attacks: trained, recorded, attacked, scored, compared."""
