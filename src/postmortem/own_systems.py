"""What the systems of a case of one's own are called, on pages and in figures."""

# Each the control of the next.
SYSTEMS = {
    "base": "base alone",
    "suspect_disabled": "suspect, off",
    "suspect": "suspect",
    "reference": "reference",
}
# The factor by which two of the changed copies scale the suspect's update.
FACTOR = 8
# Changed copies of the suspect.
COPIES = {
    "zero_b": "lora_B zero",
    "flipped": "sign flipped",
    "turned": "layers turned",
    "eighth": f"scale ÷{FACTOR}",
    "eightfold": f"scale ×{FACTOR}",
}
