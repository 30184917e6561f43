"""A simulation as a self-contained HTML page: charts, tables, and sliders over simulations that were made in advance.

point → frame (the parts that sliders move: texts, shapes, rows) → charts and tables drawn with it → page. Every chart
computes its geometry once, in Python; the page's script only replaces the frame by that of another point.
"""
