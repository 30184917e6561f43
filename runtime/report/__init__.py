"""A simulation as one HTML page that stands alone: charts, tables, and sliders over what was simulated beforehand.

point → frame (what moves: texts, shapes, rows) → charts and tables drawn with it → page. Every chart computes its
geometry once, here; the page's script only puts the frame of another point in place.
"""
