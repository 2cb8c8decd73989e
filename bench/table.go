package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"
)

func printTables(files []string) error {
	for _, file := range files {
		table, err := tableOf(file)
		if err != nil {
			return err
		}
		fmt.Println(table)
	}
	return nil
}

// tableOf is the Markdown table of a file of raw rows.
func tableOf(file string) (string, error) {
	f, err := os.Open(file)
	if err != nil {
		return "", err
	}
	defer f.Close()
	var lines []line
	sc := bufio.NewScanner(f)
	sc.Buffer(nil, 1<<20)
	for sc.Scan() {
		var l line
		if err := json.Unmarshal(sc.Bytes(), &l); err != nil {
			return "", fmt.Errorf("%s: %w", file, err)
		}
		lines = append(lines, l)
	}
	return markdown(lines), sc.Err()
}

// A cell is what is known of one row.
type cell struct {
	name    string
	unit    string
	device  string
	rates   map[string][]float64 // by side
	ratios  []float64            // pair by pair
	cpu     []float64
	trace   map[string]line // by side
	bytes   map[string]line
	values  []float64 // process
	memory  string
	process bool
}

func markdown(lines []line) string {
	var head map[string]string
	var order []*cell
	byName := map[string]*cell{}
	last := map[string]line{} // the other half of a pair, by row
	for _, l := range lines {
		if l.Part == "head" {
			head = l.Head
			head["device"] = l.Device
			continue
		}
		c := byName[l.Row]
		if c == nil {
			c = &cell{name: l.Row, rates: map[string][]float64{}, trace: map[string]line{}, bytes: map[string]line{}}
			byName[l.Row] = c
			order = append(order, c)
		}
		switch l.Part {
		case "speed", "read":
			c.unit, c.device = l.Unit, l.Device
			c.rates[l.Side] = append(c.rates[l.Side], l.Rate)
			if l.AgentCPU > 0 {
				c.cpu = append(c.cpu, l.AgentCPU)
			}
			other, ok := last[l.Row]
			if !ok || other.Round != l.Round || other.Pair != l.Pair {
				last[l.Row] = l
				continue
			}
			if l.Side == ext4 {
				l, other = other, l
			}
			if other.Rate > 0 {
				c.ratios = append(c.ratios, l.Rate/other.Rate)
			}
			delete(last, l.Row)
		case "trace":
			c.trace[l.Side] = l
		case "bytes":
			c.bytes[l.Side] = l
		case "process":
			c.process = true
			c.unit = l.Unit
			c.values = append(c.values, l.Value)
			if m := l.Memory; m != nil {
				c.memory = memory{m.Anon, m.File, m.Memfd}.String()
			}
		}
	}
	var b strings.Builder
	if head != nil {
		b.WriteString(caption(head))
	}
	b.WriteString("| row | ext4 | mount | × ext4 (quartiles) | goal | FUSE requests | flushes: ext4, mount | KiB to the device: ext4, mount | agent CPU, µs |\n")
	b.WriteString("|---|---|---|---|---|---|---|---|---|\n")
	for _, c := range order {
		b.WriteString(c.row())
	}
	return b.String()
}

func caption(head map[string]string) string {
	device := "in folders of " + head["disk"]
	switch head["device"] {
	case "loop":
		device = "on ext4 with blocks of 4096 bytes on loop devices on " + head["disk"]
	case "slow":
		device = "on ext4 with blocks of 4096 bytes on devices whose flush takes " + head["flush"]
	}
	return fmt.Sprintf("%s; %s; Linux %s; SQLite %s; %s; `%s`\n\nBoth %s. Medians of %s rounds; × ext4 is the median over pairs of blocks, above 1 the mount is faster.\n"+
		"Requests, flushes, bytes and CPU are for one transaction or look-up; bytes are of ext4 with blocks of 4096 bytes on loop devices.\n"+
		"Memory is anonymous + file-backed + memfd.\n\n",
		head["agent"], head["machine"], head["kernel"], head["sqlite"], head["date"], head["command"], device, head["rounds"])
}

func (c *cell) row() string {
	cols := make([]string, 9)
	cols[0] = c.name
	if c.process {
		cols[2] = number(median(c.values)) + " " + c.unit
		if c.memory != "" {
			cols[2] = c.memory + " " + c.unit
		} else if len(c.values) > 1 {
			cols[2] += fmt.Sprintf(" (%s to %s)", number(slices.Min(c.values)), number(slices.Max(c.values)))
		}
		return "| " + strings.Join(cols, " | ") + " |\n"
	}
	if len(c.ratios) > 0 {
		cols[1] = number(median(c.rates[ext4])) + " " + c.unit
		cols[2] = number(median(c.rates[mount])) + " " + c.unit
		cols[3] = fmt.Sprintf("**%.2f** (%.2f to %.2f)", median(c.ratios), quantile(c.ratios, 0.25), quantile(c.ratios, 0.75))
		if g, ok := goal(c.device, c.name); ok {
			cols[4] = fmt.Sprint(g)
		}
	}
	if t, ok := c.trace[mount]; ok && t.Ops > 0 {
		cols[5] = perOp(sum(t.Requests), t.Ops)
		cols[6] = perOp(sum(t.Flushes), t.Ops)
		if e, ok := c.trace[ext4]; ok && e.Ops > 0 {
			cols[6] = perOp(sum(e.Flushes), e.Ops) + ", " + cols[6]
		}
	}
	if m, ok := c.bytes[mount]; ok && m.Ops > 0 {
		e := c.bytes[ext4]
		kib := func(l line) float64 { return float64(l.Bytes) / 1024 / float64(max(l.Ops, 1)) }
		cols[7] = fmt.Sprintf("%.2f, %.2f", kib(e), kib(m))
		if kib(e) > 0 {
			cols[7] += fmt.Sprintf(" (%.2f)", kib(m)/kib(e))
		}
	}
	if len(c.cpu) > 0 && c.unit == "tx/s" {
		cols[8] = number(median(c.cpu))
	}
	return "| " + strings.Join(cols, " | ") + " |\n"
}

func sum(m map[string]int) (n int) {
	for _, one := range m {
		n += one
	}
	return n
}

func perOp(n, ops int) string {
	return strings.TrimSuffix(strings.TrimRight(fmt.Sprintf("%.2f", float64(n)/float64(ops)), "0"), ".")
}

// number has three digits or all before the point.
func number(v float64) string {
	switch {
	case v >= 100:
		return fmt.Sprintf("%.0f", v)
	case v >= 10:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.2f", v)
}

func median(values []float64) float64 { return quantile(values, 0.5) }

// quantile interpolates between the two nearest values.
func quantile(values []float64, q float64) float64 {
	if len(values) == 0 {
		return 0
	}
	s := slices.Sorted(slices.Values(values))
	at := q * float64(len(s)-1)
	i := int(at)
	if i+1 == len(s) {
		return s[i]
	}
	return s[i] + (at-float64(i))*(s[i+1]-s[i])
}
