"""How a region is learned: prompt pairs, gate, instant move, discovery through the model, calibration."""
