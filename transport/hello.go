package transport

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// This file is the part of hello that is the same for every carrier.

// Hello returns a copy of h with the carrier's fields filled in.
func (c Config) Hello(h *Hello) *Hello {
	out := *h
	if out.MinVersion == 0 && out.MaxVersion == 0 {
		out.MinVersion, out.MaxVersion = MinVersion, MaxVersion
	}
	if out.Features == 0 {
		out.Features = SupportedFeatures
	}
	if out.Limits == (Limits{}) {
		out.Limits = c.Limits()
	}
	return &out
}

// Agree returns the limits under which this end works, given what the two ends
// announced: the smaller frame of both, and what the peer wants in all else.
func Agree(own, peer Limits) (Limits, error) {
	agreed := peer
	agreed.MaxFrame = min(own.MaxFrame, peer.MaxFrame)
	if agreed.MaxFrame < MinMaxFrame {
		return Limits{}, fmt.Errorf("frames of %d bytes, at least %d: %w", agreed.MaxFrame, MinMaxFrame, ErrVersion)
	}
	return agreed, nil
}

// Welcomed checks the hub's answer to hello. It returns a [*ByeError] for a Bye.
func (c Config) Welcomed(hello *Hello, answer Message) (*Welcome, Limits, error) {
	switch m := answer.(type) {
	case *Bye:
		return nil, Limits{}, &ByeError{Code: m.Code, Text: m.Text, RetryAfter: m.RetryAfter}
	case *Welcome:
		if m.MovedURL != "" {
			return m, Limits{}, nil
		}
		if m.Version < hello.MinVersion || m.Version > hello.MaxVersion {
			return nil, Limits{}, fmt.Errorf("hub chose version %d of %d to %d: %w",
				m.Version, hello.MinVersion, hello.MaxVersion, ErrVersion)
		}
		if missing := hello.Required &^ m.Features; missing != 0 {
			return nil, Limits{}, fmt.Errorf("hub lacks features %#x: %w", uint64(missing), ErrVersion)
		}
		if extra := m.Features &^ hello.Features; extra != 0 {
			return nil, Limits{}, fmt.Errorf("hub chose features %#x that were not offered: %w", uint64(extra), ErrCorrupt)
		}
		limits, err := Agree(hello.Limits, m.Limits)
		return m, limits, err
	}
	return nil, Limits{}, fmt.Errorf("%s in answer to hello: %w", answer.Kind(), ErrCorrupt)
}

// Answer runs the hub's side of hello. It returns the Welcome and what was agreed,
// or the Bye to send. first is what arrived first, err the error of reading it.
func (c Config) Answer(ctx context.Context, h Handler, peer Peer, first Message, err error) (*Welcome, Limits, *Bye) {
	no := func(code Code, text string) (*Welcome, Limits, *Bye) {
		return nil, Limits{}, &Bye{Code: code, Text: text}
	}
	switch {
	case errors.Is(err, ErrUnknown):
		return no(CodeUnknown, err.Error())
	case errors.Is(err, ErrTooLarge):
		return no(CodeTooLarge, err.Error())
	case err != nil:
		return no(CodeCorrupt, "no hello: "+err.Error())
	}
	hello, ok := first.(*Hello)
	if !ok {
		return no(CodeProtocol, fmt.Sprintf("%s before hello", first.Kind()))
	}
	version := min(hello.MaxVersion, MaxVersion)
	if version < max(hello.MinVersion, MinVersion) {
		return no(CodeVersion, fmt.Sprintf("versions %d to %d, here %d to %d",
			hello.MinVersion, hello.MaxVersion, MinVersion, MaxVersion))
	}
	if missing := hello.Required &^ SupportedFeatures; missing != 0 {
		return no(CodeVersion, fmt.Sprintf("features %#x are not known here", uint64(missing)))
	}
	limits, err := Agree(c.Limits(), hello.Limits)
	if err != nil {
		return no(CodeVersion, err.Error())
	}
	w, err := h.Accept(ctx, peer, hello)
	if err != nil {
		return nil, Limits{}, ByeFor(err)
	}
	if w.Version == 0 {
		w.Version = version
	}
	if w.Features == 0 {
		w.Features = hello.Features & SupportedFeatures
	}
	if w.Limits == (Limits{}) {
		w.Limits = c.Limits()
	}
	return w, limits, nil
}

// ByeFor is the Bye for an error of a Handler. The text of a foreign error stays
// in the hub's log.
func ByeFor(err error) *Bye {
	if e, ok := errors.AsType[*ByeError](err); ok {
		return &Bye{Code: e.Code, Text: e.Text, RetryAfter: e.RetryAfter}
	}
	return &Bye{Code: CodeInternal, Text: "see the hub's log"}
}

// Run serves one accepted session on c, made by [NewSession]: it calls h.Serve,
// tells the peer how it ended, and returns when c has let go of its pipe, with
// Serve's error unless that is only the end of the session.
//
// When life ends, the peer is told that the hub stops.
func Run(life context.Context, h Handler, c Conn, hello *Hello, welcome *Welcome) error {
	shutdown := &Bye{Code: CodeShutdown, Text: "the hub stops"}
	ctx, cancel := context.WithCancel(life)
	defer cancel()
	stop := context.AfterFunc(life, func() { c.(*session).end(ErrClosed, shutdown, true) })
	defer stop()
	watched := make(chan struct{})
	go func() { // ctx ends with the session
		defer close(watched)
		select {
		case <-Ended(c):
			cancel()
		case <-ctx.Done():
		}
	}()
	err := h.Serve(ctx, c, hello, welcome)
	bye := &Bye{}
	select {
	case <-Ended(c):
		err = nil
	default:
		switch {
		case life.Err() != nil:
			bye, err = shutdown, nil
		case err != nil:
			bye = ByeFor(err)
		}
	}
	CloseWith(c, bye)
	cancel()
	<-watched
	return err
}

// RetryIn returns a Bye for a refusal that time cures.
func RetryIn(code Code, after time.Duration, text string) *Bye {
	return &Bye{Code: code, Text: text, RetryAfter: after}
}
