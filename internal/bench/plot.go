package bench

import (
	"fmt"
	"image/color"
	"os"
	"path/filepath"
	"slices"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
)

const (
	barWidth   = 4 // mm
	plotHeight = 110
	plotMargin = 40
	// legendShare is the room that a line of the legend takes of the height.
	legendShare = 0.06
)

// palette is told apart also without colours' names: dark to light in turns.
func palette() []color.Color {
	return []color.Color{
		color.RGBA{R: 0x1b, G: 0x4f, B: 0x8c, A: 0xff}, color.RGBA{R: 0xe0, G: 0x8e, B: 0x2d, A: 0xff},
		color.RGBA{R: 0x3a, G: 0x8f, B: 0x5c, A: 0xff}, color.RGBA{R: 0xb0, G: 0x3a, B: 0x48, A: 0xff},
		color.RGBA{R: 0x7d, G: 0x5b, B: 0xa6, A: 0xff}, color.RGBA{R: 0x6b, G: 0x6b, B: 0x6b, A: 0xff},
	}
}

// Plot draws each measurement that compares with others as NAME.svg into a directory, which
// it makes, and returns the files' paths.
func (r *Report) Plot(dir string) (files []string, err error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("plots: %w", err)
	}
	for _, m := range r.Measurements {
		cases := slices.DeleteFunc(slices.Clone(m.Cases), func(c Case) bool { return !c.comparesPairs() })
		if len(cases) == 0 {
			continue
		}
		path := filepath.Join(dir, m.Name+".svg")
		if err := drawBars(path, m.Title, cases); err != nil {
			return files, fmt.Errorf("plot %s: %w", path, err)
		}
		files = append(files, path)
	}
	return files, nil
}

func (c Case) comparesPairs() bool {
	return slices.ContainsFunc(c.Rows, func(r Row) bool { return r.Ratio > 0 })
}

// drawBars draws the ratios: a group of bars a contender, a colour a case.
func drawBars(path, title string, cases []Case) error {
	names := contendersOf(cases)
	p := plot.New()
	p.Title.Text = title
	p.Y.Label.Text = "ratio to " + cases[0].Baseline
	p.Y.Min = 0
	p.Legend.Top = true
	p.Add(plotter.NewGrid())

	highest := 1.0
	for _, c := range cases {
		for _, name := range names {
			if row, ok := c.row(name); ok {
				highest = max(highest, row.Ratio)
			}
		}
	}
	p.Y.Max = highest * (1 + legendShare*float64(len(cases)+1))

	width := vg.Length(barWidth) * vg.Millimeter
	colors := palette()
	for i, c := range cases {
		values := make(plotter.Values, len(names))
		for j, name := range names {
			if row, ok := c.row(name); ok {
				values[j] = row.Ratio
			}
		}
		bars, err := plotter.NewBarChart(values, width)
		if err != nil {
			return err
		}
		bars.LineStyle.Width = 0
		bars.Color = colors[i%len(colors)]
		bars.Offset = width * vg.Length(float64(i)-float64(len(cases)-1)/2)
		p.Add(bars)
		p.Legend.Add(c.Name, bars)
	}
	one, err := plotter.NewLine(plotter.XYs{{X: -0.5, Y: 1}, {X: float64(len(names)) - 0.5, Y: 1}})
	if err != nil {
		return err
	}
	one.LineStyle.Dashes = []vg.Length{vg.Points(3), vg.Points(3)}
	p.Add(one)
	p.NominalX(names...)
	group := vg.Length(max(26, (len(cases)+1)*barWidth)) * vg.Millimeter
	return p.Save(vg.Length(len(names))*group+plotMargin*vg.Millimeter, plotHeight*vg.Millimeter, path)
}

// contendersOf lists who has a ratio in any of the cases, without the floor, which carries nothing.
func contendersOf(cases []Case) []string {
	var names []string
	for _, c := range cases {
		for _, row := range c.Rows {
			if row.Ratio > 0 && row.Contender != floor && !slices.Contains(names, row.Contender) {
				names = append(names, row.Contender)
			}
		}
	}
	return names
}
