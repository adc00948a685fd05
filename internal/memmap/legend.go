package memmap

import (
	"fmt"
	"image"
	"image/color"

	"fcvm/internal/ui"
)

// legendLine is a line of the legend: text, and squares of colour in it.
type legendLine []legendPart

// legendPart is a square where it has a colour, then text.
type legendPart struct {
	colour *color.RGBA
	text   string
	faint  bool
}

func (p legendPart) width() int {
	w := len(p.text) * charWidth
	if p.colour != nil {
		w += swatch + charWidth
	}
	return w
}

func (l legendLine) width() int {
	w := 0
	for _, p := range l {
		w += p.width()
	}
	return w
}

// line draws one with its upper left corner at p.
func (c *canvas) line(p image.Point, l legendLine) {
	for _, part := range l {
		x := p.X
		if part.colour != nil {
			c.fill(image.Rect(x, p.Y, x+swatch, p.Y+swatch), *part.colour)
			x += swatch + charWidth
		}
		col := ink
		if part.faint {
			col = faint
		}
		c.text(image.Pt(x, p.Y), part.text, col)
		p.X += part.width()
	}
}

// legend has a line for each state. With a working set each state has two colours,
// and counts for both.
func (m *Map) legend() []legendLine {
	var lines []legendLine
	for _, n := range m.Counts() {
		out, in := colours(n.State)
		percent := 100 * float64(n.Pages) / float64(max(1, len(m.Pages)))
		line := legendLine{{&out, fmt.Sprintf("%-10s%s %5.1f %%    ", n.State, m.amount(n.Pages), percent), false}}
		if m.WorkingSet {
			line = append(line, legendPart{&in, "of these in the working set" + m.amount(n.WorkingSet), n.WorkingSet == 0})
		}
		lines = append(lines, line)
	}
	return lines
}

// amount is a count as the legend prints it, aligned.
func (m *Map) amount(pages int64) string {
	return fmt.Sprintf("%10d pages %11s", pages, ui.Size(pages*m.PageBytes))
}
