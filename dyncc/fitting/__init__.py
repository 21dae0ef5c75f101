"""Closed-form fits on calibration data: ridge maps, probes, surrogates and rankings of layers (`dyncc fit`)."""
